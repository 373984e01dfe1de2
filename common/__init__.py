"""What both sides of the boundary must agree on. Imports no other part of Silotune."""
