//go:build !linux

package testserver

import "syscall"

// dieWithParent has no counterpart here. The child stays in this process's group,
// so that an interrupt from the terminal reaches it too.
func dieWithParent() *syscall.SysProcAttr { return nil }
