"""The commands of a site's administrator."""
