"""Plans of training computed from public facts alone: pure functions, which import nothing."""
