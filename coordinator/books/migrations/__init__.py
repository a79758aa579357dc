"""The steps that bring a database of any earlier version to this one, in order, by Alembic. A step is never changed once it is released."""
