"""Schemes times models: which of them is worth its bytes, as a table, a plot and a page.

plan      what is to be run, from a TOML file              Cell
cell      one model in one scheme, measured                a row
engine    all cells, here or on Ray, each kept when done
table     CSV, Parquet, and which rows nothing beats
page      the same as one HTML file
"""
