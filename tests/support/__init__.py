"""What the tests share: makers of repositories, servers that misbehave."""
