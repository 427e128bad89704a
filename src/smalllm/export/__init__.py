"""Models as files that other programs read: names, folders and files of their formats, and the proof of each."""
