"""Every kernel of der_fast, one folder per operation; installed as `der_fast.kernels`."""
