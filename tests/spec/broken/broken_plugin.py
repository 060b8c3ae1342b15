1 / 0  # noqa: B018 - a plugin that fails
