"""The plugin here fails when it is imported, on purpose."""

collect_ignore = ["broken_plugin.py"]
