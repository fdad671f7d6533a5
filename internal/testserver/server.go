// Package testserver runs real Redis, NATS and etcd servers as child processes:
// for tests and for programs that put the drivers under load and faults.
//
// Each server has a loopback port and a temporary directory of its own, has
// answered a request when it is handed out, and keeps its port and its data over
// [Server.Restart]. It dies with this process (on Linux even if that is killed).
//
// The Redis binary is $REDIS_SERVER or redis-server from the PATH. NATS and etcd
// are $NATS_SERVER and $ETCD_SERVER, or are built at their pinned versions from
// tools/go.mod into .bin at the root of the repository.
package testserver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/dchannel/dchannel/internal/testserver/port"
)

const (
	// readyWithin is how long a server may take to answer when the caller's context
	// has no deadline. etcd needs seconds on a busy machine.
	readyWithin = time.Minute
	// stopWithin is how long a server may take to end cleanly.
	stopWithin = 15 * time.Second
	// pollEvery paces readiness checks.
	pollEvery = 10 * time.Millisecond
	// bindAttempts bounds the retries when another program takes a port between our
	// looking at it and the server's binding it.
	bindAttempts = 5
)

var (
	errNotRunning = errors.New("the server is not running")
	errRunning    = errors.New("the server is running")
	errClosed     = errors.New("the server was closed")
	errBind       = errors.New("a port was taken by another program")
)

// Server is one server. Its methods may be called concurrently.
type Server struct {
	kind     kind
	dir      string // everything of this server
	identity *identity
	index    int       // its place in nodes
	nodes    []*Server // the cluster that it is a node of, by itself if it is alone

	mu     sync.Mutex
	ports  []*port.Port
	proc   *process // nil before the first start
	closed bool
}

// kind is what differs between servers.
type kind struct {
	name   string
	binary string
	ports  int // how many it listens on; the first is for clients
	scheme string
	// args returns the command line. It may write files to s.dir.
	args func(s *Server) ([]string, error)
	// ready asks the server something that it answers only when it can work.
	ready func(ctx context.Context, s *Server) error
}

// launch runs the server and waits until it answers.
func (s *Server) launch(ctx context.Context) error {
	args, err := s.kind.args(s)
	if err != nil {
		return err
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return errClosed
	}
	if s.proc != nil && s.proc.running() {
		s.mu.Unlock()
		return errRunning
	}
	before := len(s.Log())
	p, err := startProcess(s.kind.binary, args, s.dir, s.logName())
	if err != nil {
		s.mu.Unlock()
		return err
	}
	s.proc = p
	s.mu.Unlock()

	if err := s.awaitReady(ctx, p); err != nil {
		p.kill()
		if log := s.Log(); strings.Contains(strings.ToLower(log[min(before, len(log)):]), "address already in use") {
			return errors.Join(errBind, err)
		}
		return err
	}
	return nil
}

func (s *Server) awaitReady(ctx context.Context, p *process) error {
	ctx, cancel := withReadyLimit(ctx)
	defer cancel()
	go func() { // a server that is gone will not get ready
		select {
		case <-p.exited:
			cancel()
		case <-ctx.Done():
		}
	}()
	err := poll(ctx, func() error {
		try, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		return s.kind.ready(try, s)
	})
	if !p.running() {
		return fmt.Errorf("it ended at once: %v", p.cmd.ProcessState)
	}
	return err
}

// poll tries until it works or ctx ends.
func poll(ctx context.Context, try func() error) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not ready: %w (%w)", ctx.Err(), err)
		case <-tick.C:
		}
	}
}

func withReadyLimit(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, readyWithin)
}

// Addr returns the clients' host:port. It stays the same over restarts.
func (s *Server) Addr() string { return s.port(0).Addr() }

func (s *Server) port(i int) *port.Port {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ports[i]
}

// URL returns scheme://host:port, without credentials.
func (s *Server) URL() string { return s.kind.scheme + "://" + s.Addr() }

// TLS returns a new configuration for clients: it trusts this server, and holds a
// client certificate with [MutualTLS]. It is nil without TLS.
func (s *Server) TLS() *tls.Config {
	if s.identity == nil {
		return nil
	}
	return s.identity.client.Clone()
}

// TLSFiles returns the PEM files for a client that is configured by files: the CA,
// the client's certificate and its key. They are empty without TLS.
func (s *Server) TLSFiles() (ca, cert, key string) {
	if s.identity == nil {
		return "", "", ""
	}
	return s.identity.path(caFile), s.identity.path(clientCertFile), s.identity.path(clientKeyFile)
}

// PID returns the process's id, or 0 when it is not running.
func (s *Server) PID() int {
	p, err := s.live()
	if err != nil {
		return 0
	}
	return p.cmd.Process.Pid
}

// Kill ends the server with SIGKILL and waits until it is gone.
func (s *Server) Kill() error {
	p, err := s.live()
	if err != nil {
		return err
	}
	p.kill()
	return nil
}

// Stop ends the server cleanly with SIGTERM and waits until it is gone. One that
// does not end in 15 s is killed, which is an error.
func (s *Server) Stop() error {
	p, err := s.live()
	if err != nil {
		return err
	}
	if err := p.stop(stopWithin); err != nil {
		return fmt.Errorf("stop %s: %w", s.kind.name, err)
	}
	return nil
}

// Restart starts the server again, on the same port and data, and returns when it
// answers. A server that is running is stopped cleanly before.
func (s *Server) Restart(ctx context.Context) error {
	if err := s.Stop(); err != nil && !errors.Is(err, errNotRunning) {
		return err
	}
	for attempt := 1; ; attempt++ {
		err := s.launch(ctx)
		if err == nil {
			return nil
		}
		if !errors.Is(err, errBind) || attempt == bindAttempts {
			return fmt.Errorf("restart %s: %w%s", s.kind.name, err, quoteLog(s.Log()))
		}
	}
}

// Wipe deletes the data of a server that is not running.
func (s *Server) Wipe() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosed
	}
	if s.proc != nil && s.proc.running() {
		return fmt.Errorf("wipe %s: %w", s.kind.name, errRunning)
	}
	if err := os.RemoveAll(s.data()); err != nil {
		return fmt.Errorf("wipe %s: %w", s.kind.name, err)
	}
	return os.Mkdir(s.data(), 0o700)
}

// Pause freezes the server with SIGSTOP: its connections stay open, new ones are
// accepted by the kernel, and nothing is answered.
func (s *Server) Pause() error { return s.signal(syscall.SIGSTOP) }

// Resume ends Pause.
func (s *Server) Resume() error { return s.signal(syscall.SIGCONT) }

func (s *Server) signal(sig syscall.Signal) error {
	p, err := s.live()
	if err != nil {
		return err
	}
	return p.signal(sig)
}

func (s *Server) live() (*process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed
	}
	if s.proc == nil || !s.proc.running() {
		return nil, errNotRunning
	}
	return s.proc, nil
}

// Close kills the server and removes its directory. A second Close is nil.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	if s.proc != nil {
		s.proc.kill()
	}
	// The ports stay in s.ports: Addr goes on to say where the server was.
	for _, p := range s.ports {
		p.Release()
	}
	return os.RemoveAll(s.dir)
}

// Log returns what the server has printed in all its runs; after Close, nothing.
func (s *Server) Log() string {
	b, err := os.ReadFile(s.logName())
	if err != nil {
		return ""
	}
	return string(b)
}

func (s *Server) logName() string { return filepath.Join(s.dir, "server.log") }

// data is the directory that Wipe empties.
func (s *Server) data() string { return filepath.Join(s.dir, "data") }

// quoteLog formats the end of a log to stand behind an error.
func quoteLog(log string) string {
	const most = 4 << 10
	if log = strings.TrimSpace(log); log == "" {
		return ""
	}
	if len(log) > most {
		log = "…" + log[len(log)-most:]
	}
	return "\nits log:\n" + log
}
