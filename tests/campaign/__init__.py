"""Bad luck and hostile files, at random and for as long as one likes: `make campaign MINUTES=30`."""
