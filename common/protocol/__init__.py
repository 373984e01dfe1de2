"""The boundary of a site: the messages that cross it, and their bytes. Imports no torch."""
