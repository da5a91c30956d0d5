"""What came out: the collection of spectra, tables, comparisons, and one directory per run that resumes."""
