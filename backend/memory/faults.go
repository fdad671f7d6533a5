package memory

import (
	"errors"
	"fmt"

	"github.com/dchannel/dchannel"
)

var (
	errBroken = errors.New("memory: the connection was cut")
	errClosed = errors.New("memory: the backend was closed meanwhile")
	errLost   = errors.New("memory: the server lost its state")
	errRewind = errors.New("memory: a server with older state took over")
)

// Cut cuts the backend's connection until [Backend.Heal]. Entries that are accepted
// meanwhile are not pushed to it, and every call returns [dchannel.ErrUnavailable]
// with the reason (nil stands for "the connection was cut"). A write that was
// waiting for a paused store returns [dchannel.ErrUncertain].
//
// A listener sees nothing but its Status: interrupted. It blocks, and after Heal
// it gets what it missed, as far as retention has it, and a LostError for the rest.
// Publish waits for Heal, or its context. Cutting again, or after Close, does
// nothing.
func (b *Backend) Cut(reason error) {
	if reason == nil {
		reason = errBroken
	}
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.down.Load() != nil {
		return
	}
	b.down.Store(&fault{err: fmt.Errorf("%w: %w", dchannel.ErrUnavailable, reason), cause: reason})
	close(b.broken)
	for sub := range b.subs {
		sub.slot.mu.Lock()
		sub.due = nil
		sub.interrupt(reason)
		sub.slot.mu.Unlock()
	}
}

// Heal ends what [Backend.Cut] began: calls work again, and every subscription is
// live and resynchronised, at once or, if the store is paused, when it goes on.
// Without a cut it does nothing.
func (b *Backend) Heal() {
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.down.Load()
	if f == nil || f.final {
		return
	}
	b.broken = make(chan struct{})
	b.down.Store(nil)
	for sub := range b.subs {
		sub.slot.mu.Lock()
		sub.restore(f.cause)
		sub.slot.mu.Unlock()
	}
	for w := range b.watches {
		w.resume()
	}
}

// DropPushes drops the next n pushes to this backend, whatever their channels, as
// a server does whose buffer for a slow connection is full. Each is followed by a
// resynchronisation, which comes in its place.
//
// A listener sees nothing: what it missed is read from the log. It sees a
// LostError if retention has dropped it by then. A later call replaces n; 0 ends it.
func (b *Backend) DropPushes(n int) { b.dropPushes.Store(int64(n)) }

// LoseReplies makes the next n writes of this backend (publishes, closes,
// removals) take effect without telling: they return [dchannel.ErrUncertain], as
// when the connection breaks between request and reply.
//
// A listener sees each message once, for the core tries again under the same ID.
// A publisher sees a longer call, or ErrUncertain where it is not to be tried
// again. A later call replaces n; 0 ends it.
func (b *Backend) LoseReplies(n int) { b.loseReplies.Store(int64(n)) }

// Pause makes the store stand still until [Store.Resume], as a stopped process does
// (SIGSTOP, a long garbage collection, a frozen virtual machine): connections stay
// open and no call is answered. A call that is not answered before its context
// ends returns the context's error. If it is a write, that is joined with
// [dchannel.ErrUncertain], and the write is done at Resume, late but surely:
// nobody reads the server's buffers but the server.
//
// A listener sees nothing and misses nothing. Pausing again does nothing.
func (s *Store) Pause() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop()
}

// Resume ends what [Store.Pause] began. When it returns, all calls that were waiting
// have been done, in the order in which they came. Without a pause it does nothing.
func (s *Store) Resume() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gate.Load() {
		s.start()
	}
}

// LoseState makes the store forget everything, as a restart without persistence
// does, or a flush. All connections break and come back (of a paused store: when it
// goes on), and the incarnation is another one.
//
// A listener that was up to date, or not, gets a LostError of unknown count, since
// nobody knows what was accepted and never pushed. What is published afterwards
// arrives, in a new epoch. A channel that was closed is open again for those who
// have not seen the close.
func (s *Store) LoseState() {
	s.restart(errLost, func() {
		s.each(func(sl *slot) {
			sl.end()
			sl.loseLock()
		})
	})
}

// LoseLast takes back the last n entries of channel's log (a group commit is one
// entry, a close marker too), as far as they are retained, as a failover to a
// replica does that had not received them. All connections break and come back,
// and the incarnation is another one. The same sequence numbers are given out again
// for other messages.
//
// A listener gets a LostError of unknown count, and then what is published
// afterwards. A listener that has seen what was taken back keeps it.
func (s *Store) LoseLast(channel string, n int) {
	s.restart(errRewind, func() {
		if sl, _, _ := s.find(channel, true); sl != nil {
			sl.rewind(n)
			s.leave(sl)
		}
	})
}

// restart does what a server loses behind the gate, so that nobody sees half of it
// or the old incarnation with the new state.
func (s *Store) restart(reason error, lose func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	paused := s.gate.Load()
	s.stop()
	lose()
	s.incarnation = dchannel.NewID()
	s.each(func(sl *slot) {
		for _, sub := range sl.subs {
			if !sub.down {
				sub.interrupt(reason)
				sub.due = reason
			}
		}
	})
	if !paused {
		s.start()
	}
}

// stop puts the gate up. When it returns nothing is going on behind it: whoever had
// passed held a lock that stop took afterwards. Store.mu is held.
func (s *Store) stop() {
	if s.gate.Swap(true) {
		return
	}
	for i := range s.shards {
		sh := &s.shards[i]
		sh.mu.Lock()
		for _, sl := range sh.slots {
			sl.mu.Lock()
			sl.mu.Unlock() //nolint:staticcheck // waiting for its holder is the point
		}
		sh.mu.Unlock()
	}
}

// start does what waits and takes the gate down. Store.mu is held.
func (s *Store) start() {
	s.goOn()
	s.gate.Store(false)
	s.each(func(sl *slot) {
		for _, sub := range sl.subs {
			if sub.due != nil {
				sub.restore(sub.due)
			}
		}
		sl.hintLock()
	})
}
