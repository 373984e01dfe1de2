"""A site: records in, one private adapter update out. Imports only itself and common."""
