"""Bits chosen by what this device measures, under a budget that the user names; after OHQ.

space           units and schemes: what there is to choose from
latency         what each choice takes here                              Latencies
sensitivity     what each choice costs the answers                       Sensitivity
budget          what the user allows                                     Budget
allocate        the integer program                                      Chosen
verify          a look at what was chosen, on data held back             Measured
search          all of it                                                Search
"""
