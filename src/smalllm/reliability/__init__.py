"""How the promises of docs/reliability.md are put to the test: disks that fail, runs that are killed, and who counts."""
