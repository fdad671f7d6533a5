package faultproxy

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// link is one client's connection and the one to the server that belongs to it.
type link struct {
	p      *Proxy
	client *net.TCPConn
	done   chan struct{} // closed by reset

	// The rest is guarded by p.mu.
	server *net.TCPConn // nil until it is connected
	over   bool         // done is closed
	lost   bool         // bytes of it, or an end, have vanished
	trap   *trap        // its request went this way
	recent []byte       // the last bytes to the server, in which a request may have begun
	reply  []byte       // swallowed for trap
}

// reset sends RST to both sides and makes the link's goroutines end. p.mu is held.
func (l *link) reset() {
	if l.over {
		return
	}
	l.over = true
	close(l.done)
	abort(l.client)
	if l.server != nil {
		abort(l.server)
	}
}

// abort closes with RST instead of FIN, and throws away what is still to be sent.
func abort(c *net.TCPConn) {
	_ = c.SetLinger(0) // the connection may be broken already, and then so be it
	_ = c.Close()
}

func (l *link) run() {
	defer func() {
		l.p.mu.Lock()
		l.reset()
		delete(l.p.links, l)
		l.p.mu.Unlock()
	}()
	server, err := (&net.Dialer{Timeout: dialWithin}).DialContext(l.p.ctx, "tcp", l.p.target)
	if err != nil {
		// A server that is down is a reset to a client that was accepted here, and
		// nothing at all to one in a blackhole.
		if l.judge(ToClient, chunk{end: err}) == swallow {
			<-l.done
		}
		return
	}
	l.p.mu.Lock()
	l.server = server.(*net.TCPConn)
	if l.over {
		abort(l.server)
		l.p.mu.Unlock()
		return
	}
	l.p.mu.Unlock()

	var wg sync.WaitGroup
	wg.Go(func() { l.pump(ToServer, l.client, l.server) })
	wg.Go(func() { l.pump(ToClient, l.server, l.client) })
	wg.Wait()
	l.closeClean()
}

// closeClean ends a link whose two sides have both said that they are done: with
// FIN, so that what is still in the kernel's buffers arrives.
func (l *link) closeClean() {
	l.p.mu.Lock()
	defer l.p.mu.Unlock()
	if l.over {
		return
	}
	l.over = true
	close(l.done)
	_ = l.client.Close()
	_ = l.server.Close()
}

// chunk is what one read returned: bytes, or the end of the stream.
type chunk struct {
	data []byte
	end  error
	due  time.Time
}

// inFlight bounds the chunks that Delay holds up: what a long line would hold.
const inFlight = 1024

// pump moves bytes one way until that way has ended. Reading goes on while earlier
// bytes are held up, so that a delay does not slow the stream.
func (l *link) pump(d Direction, src, dst *net.TCPConn) {
	queue := make(chan chunk, inFlight)
	var wg sync.WaitGroup
	wg.Go(func() { l.write(d, dst, queue) })
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		l.p.mu.Lock()
		due := time.Now().Add(l.p.delay)
		l.p.mu.Unlock()
		if n > 0 && !l.send(queue, chunk{data: bytes.Clone(buf[:n]), due: due}) {
			break
		}
		if err != nil {
			l.send(queue, chunk{end: err, due: due})
			break
		}
	}
	wg.Wait()
}

func (l *link) send(queue chan<- chunk, c chunk) bool {
	select {
	case queue <- c:
		return true
	case <-l.done:
		return false
	}
}

// write forwards chunks when they are due and decides what becomes of each.
func (l *link) write(d Direction, dst *net.TCPConn, queue <-chan chunk) {
	for {
		var c chunk
		select {
		case c = <-queue:
		case <-l.done:
			return
		}
		if wait := time.Until(c.due); wait > 0 {
			timer := time.NewTimer(wait)
			select {
			case <-timer.C:
			case <-l.done:
				timer.Stop()
				return
			}
		}
		switch l.judge(d, c) {
		case forward:
			if c.end != nil {
				l.finish(dst, c.end)
				return
			}
			if _, err := dst.Write(c.data); err != nil {
				l.finish(dst, err)
				return
			}
		case swallow:
			if c.end != nil {
				// The end was lost too: this side must go on believing in the other
				// one, until the link is reset.
				<-l.done
				return
			}
		case spring:
			if l.spring() {
				return
			}
		}
	}
}

// finish passes an end on: a clean one as a clean one, any other as a reset.
func (l *link) finish(dst *net.TCPConn, end error) {
	if errors.Is(end, io.EOF) {
		_ = dst.CloseWrite() // if that side is broken, its own pump will say so
		return
	}
	l.p.mu.Lock()
	defer l.p.mu.Unlock()
	l.reset()
}

type verdict uint8

const (
	forward verdict = iota
	swallow
	spring // swallow, and ask the trap whether that was the reply
)

func (l *link) judge(d Direction, c chunk) verdict {
	l.p.mu.Lock()
	defer l.p.mu.Unlock()
	switch {
	case l.p.hole&d != 0:
		l.lost = true
		return swallow
	case c.end != nil:
		return forward
	case d == ToServer:
		if l.trap == nil {
			l.enter(c.data)
		}
		return forward
	case l.trap == nil:
		return forward
	default:
		l.reply = append(l.reply, c.data...)
		return spring
	}
}
