"""The Hugging Face form of a model: conversion both ways, and the stand-alone model that ships beside the weights."""
