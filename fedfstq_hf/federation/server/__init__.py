"""The server: what arrived, what of it is used, and the adapter that it makes."""
