"""The processes: publisher, replica, worker service, and the one loop that drives them."""
