// Package port reserves TCP ports on the loopback interface, for servers and
// proxies of tests which must come back on the same port after a restart.
//
// Asking the kernel for port 0 is not enough for that: it gives a port of the
// ephemeral range, which any outgoing connection of the machine may take while the
// server is down. So ports come from below that range, and each is locked against
// other test processes for as long as it is reserved, whether or not a server is
// listening on it just then.
package port

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
)

const (
	// lowest keeps clear of well-known services, and highest of the ephemeral range
	// (from 32768 on Linux, from 49152 on macOS). Above it is room for the bus of each
	// Redis Cluster node, which listens on the node's port + 10000.
	lowest, highest = 10000, 19999

	// attempts bounds the search; a machine with this many misses has no free ports.
	attempts = 1000
)

// Port is a reserved port. It is free for whoever holds it until Release.
type Port struct {
	number int
	once   sync.Once
}

// Reserve picks a port at random that nobody listens on and nobody has reserved.
func Reserve() (*Port, error) {
	for range attempts {
		n := lowest + rand.IntN(highest-lowest+1)
		ok, err := lock(n)
		if err != nil {
			return nil, fmt.Errorf("reserve a port: %w", err)
		}
		if !ok {
			continue
		}
		if bindable(n) {
			return &Port{number: n}, nil
		}
		unlock(n)
	}
	return nil, fmt.Errorf("reserve a port: none free in %d tries between %d and %d", attempts, lowest, highest)
}

// Number returns the port's number.
func (p *Port) Number() int { return p.number }

// Addr returns "127.0.0.1:number".
func (p *Port) Addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(p.number)) }

// Release lets others have the port. Releasing again does nothing.
func (p *Port) Release() { p.once.Do(func() { unlock(p.number) }) }

func bindable(n int) bool {
	l, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(n)))
	if err != nil {
		return false
	}
	l.Close()
	return true
}

// held is this process's part of the reservation and file the part between
// processes: record locks, one byte a port, which the kernel drops when the process
// dies. Record locks do not exclude their own process, hence both. The file stays
// open for good, because closing any descriptor of it would drop every lock.
var (
	mu   sync.Mutex
	held = map[int]bool{}
	file *os.File
)

func lock(n int) (bool, error) {
	mu.Lock()
	defer mu.Unlock()
	if held[n] {
		return false, nil
	}
	if file == nil {
		// One file for each user: another user's could not be opened for writing.
		name := filepath.Join(os.TempDir(), fmt.Sprintf("dchannel-ports-%d.lock", os.Getuid()))
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return false, err
		}
		file = f
	}
	err := record(n, syscall.F_WRLCK)
	if errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EACCES) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	held[n] = true
	return true, nil
}

func unlock(n int) {
	mu.Lock()
	defer mu.Unlock()
	delete(held, n)
	_ = record(n, syscall.F_UNLCK) // cannot fail on an open file, and at worst a port stays reserved
}

func record(n int, kind int16) error {
	return syscall.FcntlFlock(file.Fd(), syscall.F_SETLK, &syscall.Flock_t{
		Type: kind, Whence: io.SeekStart, Start: int64(n), Len: 1,
	})
}
