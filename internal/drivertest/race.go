//go:build race

package drivertest

// race: heap figures of a program with the race detector say nothing.
const race = true
