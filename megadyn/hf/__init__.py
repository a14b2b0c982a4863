"""The Hugging Face form of a model: conversion both ways, and the stand-alone model code that ships with the weights."""
