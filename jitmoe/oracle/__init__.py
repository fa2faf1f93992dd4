"""Defines what is right: the reference, the error rule, and the data and sizes to try them on."""
