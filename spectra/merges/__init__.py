"""Is the adapter really in the merged model? Three models in, one verdict per matrix out."""
