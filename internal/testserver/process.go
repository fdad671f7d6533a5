package testserver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// process is one run of a server.
type process struct {
	cmd    *exec.Cmd
	exited <-chan struct{} // closed when the process has been waited for
}

// startProcess runs the binary with its output appended to the file logName.
func startProcess(binary string, args []string, dir, logName string) (*process, error) {
	log, err := os.OpenFile(logName, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close() // the child has its own descriptor
	cmd := exec.Command(binary, args...)
	cmd.Dir = dir
	cmd.Stdout, cmd.Stderr = log, log
	exited, err := StartChild(cmd)
	if err != nil {
		return nil, err
	}
	return &process{cmd: cmd, exited: exited}, nil
}

// StartChild starts cmd as a process that dies with this one (on Linux even if this one
// is killed), and waits for it: exited is closed when it is gone.
func StartChild(cmd *exec.Cmd) (exited <-chan struct{}, err error) {
	cmd.SysProcAttr = dieWithParent()
	gone := make(chan struct{})
	started := make(chan error, 1)
	go func() {
		// The kernel takes the thread that forked for the parent, and kills the child
		// when that thread ends (golang.org/issue/27505). So this goroutine keeps its
		// thread until the child is gone.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		_ = cmd.Wait() // a killed process has no exit status worth reporting
		close(gone)
	}()
	return gone, <-started
}

func (p *process) running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

func (p *process) signal(s syscall.Signal) error {
	err := p.cmd.Process.Signal(s)
	if errors.Is(err, os.ErrProcessDone) {
		return errNotRunning
	}
	return err
}

// kill ends the process for sure. A process that is gone already is no error.
func (p *process) kill() {
	_ = p.signal(syscall.SIGKILL)
	<-p.exited
}

// stop asks the process to end and waits, and kills it if it does not.
func (p *process) stop(limit time.Duration) error {
	// A stopped process would not see SIGTERM before it goes on.
	if err := errors.Join(p.signal(syscall.SIGTERM), p.signal(syscall.SIGCONT)); err != nil && p.running() {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	select {
	case <-p.exited:
		return nil
	case <-ctx.Done():
		p.kill()
		return fmt.Errorf("still there %v after SIGTERM, so it was killed", limit)
	}
}
