package etcd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/entry"
)

// watchLoop keeps a watch open until the push ends. A broken connection is not seen here: the
// client resumes the watch at the revision after the last one, and nothing is missed. What is
// seen is a watch that the client does not resume (compacted, no leader, refused), or that was told to
// begin anew.
func (p *push) watchLoop() {
	for failures := 0; p.ctx.Err() == nil; {
		began := time.Now()
		opened, reason := p.watchOnce()
		if p.ctx.Err() != nil {
			return
		}
		refused := mapError(context.Background(), reason, false)
		p.turn(reason, func() {
			p.watch = false
			if errors.Is(refused, dchannel.ErrRefused) {
				p.final = refused // for who subscribes now; for the others it is tried again
			}
		})
		if failures++; opened && time.Since(began) > time.Second {
			failures = 0
		}
		// The first attempt follows at once, and then up to a second apart.
		if failures > 0 {
			_ = pause(p.ctx, rand.N(10*time.Millisecond<<min(failures, 7)))
		}
	}
}

// watchOnce opens a watch and serves it until it ends. It uses a watcher of its own, and so a stream of
// its own: ending it ends the server's side of it too, and no watch of the application shares it.
func (p *push) watchOnce() (opened bool, reason error) {
	ctx, cancel := context.WithCancelCause(p.ctx)
	w := clientv3.NewWatcher(p.b.client)
	defer func() {
		cancel(nil)
		if err := w.Close(); err != nil {
			p.b.log.Debug("etcd backend: closing the watch", "error", err)
		}
		p.mu.Lock()
		p.restart, p.progress = nil, nil
		p.mu.Unlock()
	}()
	p.mu.Lock()
	p.restart = cancel
	seen := p.seen
	p.mu.Unlock()
	opening := time.AfterFunc(p.b.opts.probeTimeout, func() { cancel(errNoWatch) })
	defer opening.Stop()
	// The keys of locks and of logs are neighbours. Fragments keep a burst below gRPC's limits.
	responses := w.Watch(clientv3.WithRequireLeader(ctx), p.b.keys.locks,
		clientv3.WithRange(clientv3.GetPrefixRangeEnd(p.b.keys.logs)), clientv3.WithRev(seen),
		clientv3.WithFragment(), clientv3.WithCreatedNotify())
	for r := range responses {
		if err := r.Err(); err != nil {
			if errors.Is(err, rpctypes.ErrCompacted) {
				p.reached(ctx, 0)
			}
			return opened, fmt.Errorf("the watch ended: %w", err)
		}
		switch {
		case r.Created:
			if !opening.Stop() {
				continue // the timer has cancelled it
			}
			opened = true
			if seen == 0 {
				p.reached(ctx, r.Header.Revision)
			}
			p.turn(nil, func() { p.watch, p.final, p.progress = true, nil, w.RequestProgress })
		case r.IsProgressNotify():
			p.reached(ctx, r.Header.Revision)
			select {
			case p.heard <- struct{}{}:
			default:
			}
		default:
			for _, ev := range r.Events {
				if ev.Kv == nil {
					continue
				}
				switch {
				case bytes.HasPrefix(ev.Kv.Key, []byte(p.b.keys.locks)):
					p.hint(ev)
				case ev.Type == clientv3.EventTypePut: // deletions are retention's work
					p.dispatch(ev.Kv.Key, ev.Kv.Value)
				}
				// Not the header's revision: while a watch catches up, that is far ahead.
				seen = ev.Kv.ModRevision
			}
			p.reached(ctx, seen)
		}
	}
	if cause := context.Cause(ctx); cause != nil {
		return opened, cause
	}
	return opened, errors.New("the watch ended")
}

// reached notes where the watch after the present one goes on. That saves the core from reading
// what it would have missed, and no more: it is told to compare positions in any case. The next
// watch begins with the revision itself, not the one after: a server does not answer the
// progress requests of a watch that begins in the future.
func (p *push) reached(ctx context.Context, revision int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if ctx.Err() == nil { // not told meanwhile that revisions mean nothing any more
		p.seen = revision
	}
}

var errNoWatch = errors.New("the server did not open the watch in time")

// dispatch gives an entry to its channel's sinks, on the watch's goroutine: sinks do not block.
func (p *push) dispatch(key, value []byte) {
	name := p.b.keys.channelOf(key)
	if name == nil {
		return
	}
	p.mu.Lock()
	subs := p.subs[string(name)]
	p.mu.Unlock()
	if len(subs) == 0 {
		return
	}
	e, err := entry.Parse(value)
	if err != nil {
		p.b.log.Warn("etcd backend: a foreign key in the namespace", "error", err)
		return
	}
	p.b.tails.pushed(name, e)
	for _, s := range subs {
		s.tell(func(k dchannel.Sink) { k.Entry(e) })
	}
}
