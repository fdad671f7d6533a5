package faultproxy

import "bytes"

// trap waits for one request, and then for the reply to it.
type trap struct {
	request []byte
	arrived func(reply []byte) bool
	sprung  chan struct{}
}

// CutBeforeReply waits for the next request: a stretch of bytes from one client that
// contains match. The request is forwarded; the first bytes that the server then
// sends on that connection are swallowed, and the connection is reset: the server has
// done what was asked, and the client cannot know. The returned channel is closed
// when that has happened.
//
// That suits a protocol of one request and one reply at a time on a connection that
// is otherwise quiet (Redis); see CutBeforeReplyFunc for the others. Each call is good
// for one cut. TLS hides the bytes.
func (p *Proxy) CutBeforeReply(match []byte) <-chan struct{} {
	return p.CutBeforeReplyFunc(match, func([]byte) bool { return true })
}

// CutBeforeReplyFunc is CutBeforeReply for protocols in which other bytes may come
// before the reply (NATS subscriptions, HTTP/2 flow control). arrived gets all that
// the server has sent on the connection since the request and says whether the reply
// is among it; until then those bytes are swallowed. It may also ignore them and ask
// the server, behind the proxy's back, whether the request has been executed. It is
// called each time when bytes come, must not keep or change reply, and must not call
// the proxy's Close.
func (p *Proxy) CutBeforeReplyFunc(match []byte, arrived func(reply []byte) bool) <-chan struct{} {
	if len(match) == 0 {
		panic("faultproxy: an empty match is in every request")
	}
	t := &trap{request: bytes.Clone(match), arrived: arrived, sprung: make(chan struct{})}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.traps = append(p.traps, t)
	return t.sprung
}

// enter puts the link into the first trap whose request ends in data. p.mu is held,
// and data has not been forwarded yet, so the reply cannot slip through.
func (l *link) enter(data []byte) {
	if len(l.p.traps) == 0 {
		l.recent = nil
		return
	}
	begun := 0
	seen := append(l.recent, data...)
	for i, t := range l.p.traps {
		if bytes.Contains(seen, t.request) {
			l.trap, l.recent = t, nil
			l.p.traps = append(l.p.traps[:i:i], l.p.traps[i+1:]...)
			return
		}
		begun = max(begun, len(t.request)-1)
	}
	// A request may be split over reads: keep what could be its beginning.
	l.recent = bytes.Clone(seen[max(0, len(seen)-begun):])
}

// spring resets the link if the reply has come.
func (l *link) spring() bool {
	// Only the goroutine that writes to the client touches trap from here on, and
	// reply ever. The callback runs unlocked, for it may take its time.
	if !l.trap.arrived(l.reply) {
		return false
	}
	l.p.mu.Lock()
	defer l.p.mu.Unlock()
	if !l.over {
		l.p.cuts++
	}
	l.reset()
	close(l.trap.sprung)
	return true
}
