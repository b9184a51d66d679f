"""Callbacks for training frameworks: one module a framework, which imports that framework."""
