"""What a model is made of; private. README.md beside this file explains it."""
