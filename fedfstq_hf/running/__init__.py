"""What `fedfstq train | serve | evaluate | init` do, for a program that calls them itself."""
