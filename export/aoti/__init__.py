"""Engine files of AOTInductor: one package of machine code and weights for each network."""
