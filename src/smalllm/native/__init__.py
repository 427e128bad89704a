"""C++ for the few inner loops that a CPU runs all day; everything works, slower, without a compiler."""
