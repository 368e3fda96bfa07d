"""What was trained as files that others read, and back: workdirs, exported folders, the release's layout."""
