"""WHERE: a recipe is carried out on arrays. ``reference`` on any namespace, ``cpu`` by kernels on NumPy arrays."""
