// Package faultproxy is a TCP proxy that breaks connections on command: the network
// between a client and a server, as a fault test wants it.
package faultproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/dchannel/dchannel/internal/testserver/port"
)

// Direction says which way bytes flow.
type Direction uint8

// The directions; they can be combined.
const (
	ToServer Direction = 1 << iota
	ToClient
	Both = ToServer | ToClient
)

// dialWithin bounds a connection attempt to the target, which is on this machine.
const dialWithin = 5 * time.Second

// Proxy forwards connections to one target. Its methods may be called concurrently.
type Proxy struct {
	target string
	port   *port.Port
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu       sync.Mutex
	listener net.Listener // nil while connections are refused
	links    map[*link]struct{}
	hole     Direction // where bytes vanish
	delay    time.Duration
	traps    []*trap // armed, waiting for their request
	accepted int
	cuts     int
	closed   bool
}

// New starts a proxy in front of target, a host:port.
func New(target string) (*Proxy, error) {
	p := &Proxy{target: target, links: map[*link]struct{}{}}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	// Another program may take a port between the look and the listening.
	var err error
	for range 5 {
		if p.port, err = port.Reserve(); err != nil {
			break
		}
		if err = p.Refuse(false); err == nil {
			return p, nil
		}
		p.port.Release()
	}
	p.cancel()
	return nil, fmt.Errorf("faultproxy: %w", err)
}

// Addr returns the host:port for clients. It never changes.
func (p *Proxy) Addr() string { return p.port.Addr() }

// Connections returns how many clients are connected.
func (p *Proxy) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.links)
}

// Accepted returns how many connections there have been.
func (p *Proxy) Accepted() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.accepted
}

// Cuts returns how many connections the proxy has reset on command: by Cut, by Heal
// after a blackhole, and by CutBeforeReply.
func (p *Proxy) Cuts() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cuts
}

// Cut resets all connections at once (RST on both sides) and returns how many there
// were. New ones are accepted.
func (p *Proxy) Cut() int { return p.cut(func(*link) bool { return true }) }

func (p *Proxy) cut(which func(*link) bool) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for l := range p.links {
		if !l.over && which(l) {
			l.reset()
			n++
		}
	}
	p.cuts += n
	return n
}

// Refuse makes new connections fail with "connection refused" while those that there
// are go on, or, with false, takes new connections again.
func (p *Proxy) Refuse(refuse bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return net.ErrClosed
	case !refuse:
		return p.listen()
	case p.listener != nil:
		// The kernel resets connections that nobody has accepted yet.
		err := p.listener.Close()
		p.listener = nil
		return err
	}
	return nil
}

// Blackhole makes bytes in direction d vanish while connections stay open, as when a
// cable is pulled or a firewall forgets its state. New connections are accepted and
// meet the same silence. It replaces an earlier direction.
func (p *Proxy) Blackhole(d Direction) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hole = d
}

// Delay holds up bytes by d in each direction, so that a round trip takes 2d longer.
// Throughput stays. 0 ends it for the bytes that come later.
func (p *Proxy) Delay(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay = d
}

// Heal ends what Blackhole, Delay and Refuse began. Connections that lost bytes are
// reset: TCP never goes on with a hole in its stream.
func (p *Proxy) Heal() error {
	p.mu.Lock()
	p.hole, p.delay = 0, 0
	p.mu.Unlock()
	// Nothing gets lost from here on, so no link can be missed.
	p.cut(func(l *link) bool { return l.lost })
	return p.Refuse(false)
}

// Close ends all connections and returns when nothing of the proxy is left. A second
// Close is nil.
func (p *Proxy) Close() error {
	p.mu.Lock()
	first := !p.closed
	p.closed = true
	if first {
		p.cancel()
		if p.listener != nil {
			p.listener.Close()
		}
		for l := range p.links {
			l.reset()
		}
	}
	p.mu.Unlock()
	p.wg.Wait()
	p.port.Release()
	return nil
}

// listen takes connections from now on. p.mu is held.
func (p *Proxy) listen() error {
	if p.listener != nil {
		return nil
	}
	l, err := net.Listen("tcp4", p.port.Addr())
	if err != nil {
		return err
	}
	p.listener = l
	p.wg.Go(func() { p.accept(l) })
	return nil
}

func (p *Proxy) accept(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// The client was gone before it was accepted, or descriptors are short:
			// that must not become a busy loop.
			select {
			case <-time.After(10 * time.Millisecond):
				continue
			case <-p.ctx.Done():
				return
			}
		}
		l := &link{p: p, client: conn.(*net.TCPConn), done: make(chan struct{})}
		p.mu.Lock()
		if p.closed || p.listener != listener {
			l.reset()
			p.mu.Unlock()
			continue
		}
		p.accepted++
		p.links[l] = struct{}{}
		p.mu.Unlock()
		p.wg.Go(l.run)
	}
}
