"""Writes trained models as files that other programs read, and reads them back: workdirs, exports, the release's layout."""
