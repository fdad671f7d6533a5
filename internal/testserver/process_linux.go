package testserver

import "syscall"

// dieWithParent makes the kernel kill the child when this process goes away,
// however it goes.
func dieWithParent() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}
