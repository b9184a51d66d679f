"""Callbacks for frameworks, one module each; none is imported with the library."""
