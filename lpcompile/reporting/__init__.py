"""What is said of a compiled model: the certificate and the checks of a policy."""
