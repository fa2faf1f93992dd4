"""What is right: the reference, the error rule, and the data and sizes that both are tried on."""
