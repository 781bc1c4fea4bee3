"""Who is alive, who is stuck, and when all stop."""
