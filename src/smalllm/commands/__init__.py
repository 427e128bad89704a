"""One file per verb: `smalllm VERB` lives in commands/VERB.py. Only these and serve/ print or parse arguments."""
