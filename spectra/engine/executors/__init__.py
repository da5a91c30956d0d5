"""Where matrices are solved: this machine's cores, a device, a Dask cluster."""
