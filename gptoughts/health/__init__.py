"""What is wrong with this machine, what that costs, and the line that mends it."""
