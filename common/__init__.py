"""What both sides of the boundary must agree on. Imports nothing of client, server or simulations."""
