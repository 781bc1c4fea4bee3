"""Every option, its checks, and how it is parsed."""
