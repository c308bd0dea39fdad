"""What clients, gateway, queue and worker send each other; free of torch and of Redis."""
