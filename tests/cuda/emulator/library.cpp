// The loader wants a source. The code is in objects that the tests have compiled.
