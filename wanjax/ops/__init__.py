"""Operations with more than one implementation, each behind one function."""
