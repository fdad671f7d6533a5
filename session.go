package dchannel

import (
	"context"
	"fmt"
	"math"
	"reflect"
	"sync"
	"time"
)

// session is what the handles of one backend value share in this process. It
// exists while there are any.
type session struct {
	backend Backend
	ctx     context.Context // ends with the session
	cancel  context.CancelFunc
	readers chan struct{} // slots for feeds that catch up
	heads   heads

	immediate ImmediatePublisher // the backend, if it is one
	maxFrame  int                // bytes

	checkEvery time.Duration // 0: never

	mu      sync.Mutex
	locals  map[string]*local
	feeds   int                // of locals
	uncheck context.CancelFunc // while there are feeds to be checked
}

// local is what the handles of one channel share in this process: one upstream
// feed and one queue of publishes, each made when first needed.
type local struct {
	s    *session
	name string
	refs int   // handles; under s.mu
	feed *feed // under s.mu
	// gone is closed when the feed before the next one has no subscription any more:
	// a backend has at most one of a channel. nil: there was none. Under s.mu.
	gone chan struct{}
	pub  publisher
}

const concurrentReads = 16

var sessions = struct {
	mu sync.Mutex
	of map[Backend]*session
}{of: map[Backend]*session{}}

// checkBackend tells whether b can be used, and be a key.
func checkBackend(b Backend) error {
	if b == nil {
		return fmt.Errorf("%w: the backend is nil", ErrInvalidOption)
	}
	v := reflect.ValueOf(b)
	if v.Kind() == reflect.Pointer && v.IsNil() {
		return fmt.Errorf("%w: the backend is a nil %T", ErrInvalidOption, b)
	}
	if !v.Comparable() {
		return fmt.Errorf("%w: the backend's type %T is not comparable", ErrInvalidOption, b)
	}
	return nil
}

// acquire returns the channel's shared part, with a reference on it.
func acquire(b Backend, name string) *local {
	sessions.mu.Lock()
	defer sessions.mu.Unlock()
	s := sessions.of[b]
	if s == nil {
		s = &session{backend: b, readers: make(chan struct{}, concurrentReads), locals: map[string]*local{}}
		s.ctx, s.cancel = context.WithCancel(context.Background())
		s.heads.s = s
		s.immediate, _ = b.(ImmediatePublisher)
		s.maxFrame = math.MaxInt32
		if l, ok := b.(FrameLimiter); ok {
			s.maxFrame = min(s.maxFrame, l.MaxFrame())
		}
		sessions.of[b] = s
		if c, ok := b.(Checker); ok {
			s.checkEvery = c.CheckEvery()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.locals[name]
	if l == nil {
		l = &local{s: s, name: name}
		l.pub.local = l
		s.locals[name] = l
	}
	l.refs++
	return l
}

// retain adds a reference; the caller has one.
func (l *local) retain() {
	l.s.mu.Lock()
	l.refs++
	l.s.mu.Unlock()
}

// release gives a reference back. The last one of a session ends it.
func (l *local) release() {
	sessions.mu.Lock()
	defer sessions.mu.Unlock()
	s := l.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.refs--; l.refs > 0 {
		return
	}
	delete(s.locals, l.name)
	if len(s.locals) == 0 {
		delete(sessions.of, s.backend)
		s.cancel()
	}
}

// upstream returns the channel's feed, begun if there is none, with one more user.
func (l *local) upstream() *feed {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	if l.feed == nil {
		f := &feed{s: l.s, local: l, name: l.name, since: time.Now(), gone: make(chan struct{})}
		var ctx context.Context
		ctx, f.cancel = context.WithCancel(l.s.ctx)
		before := l.gone
		l.feed, l.gone = f, f.gone
		l.s.count(+1)
		l.refs++ // until it has no subscription
		go f.attach(ctx, before)
	}
	l.feed.users++
	return l.feed
}

// leave gives up one use of f. The last one ends it.
func (l *local) leave(f *feed) {
	l.s.mu.Lock()
	f.users--
	last := f.users == 0
	if last {
		l.s.forget(l, f)
	}
	l.s.mu.Unlock()
	if !last {
		return
	}
	f.mu.Lock()
	sub := f.sub
	f.sub = nil
	if f.phase < ended {
		f.setPhase(released)
	}
	if f.cancel != nil {
		f.cancel()
	}
	f.pending = nil
	f.mu.Unlock()
	f.unsubscribe(sub)
}

// unsubscribe closes sub, which was taken out of f, and lets the next feed of the
// channel subscribe. Without one it does nothing: then attach or somebody else does.
func (f *feed) unsubscribe(sub Subscription) {
	if sub != nil {
		sub.Close()
		f.leftServer()
	}
}

// leftServer notes that f has no subscription and will not get one. It is called once.
func (f *feed) leftServer() {
	close(f.gone)
	f.local.release()
}

// over makes room for a next feed of the channel, now that f has ended or failed:
// who comes later asks the backend again.
func (s *session) over(f *feed) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.locals[f.name]; l != nil {
		s.forget(l, f)
	}
}

// forget makes room for a next feed in l. s.mu is held.
func (s *session) forget(l *local, f *feed) {
	if l.feed == f {
		l.feed = nil
		s.count(-1)
	}
}

// count keeps the number of feeds; positions are checked while there are any. s.mu is
// held.
func (s *session) count(n int) {
	s.feeds += n
	switch {
	case s.feeds == 0 && s.uncheck != nil:
		s.uncheck()
		s.uncheck = nil
	case s.feeds > 0 && s.uncheck == nil && s.checkEvery > 0:
		ctx, cancel := context.WithCancel(s.ctx)
		s.uncheck = cancel
		go s.check(ctx)
	}
}

// check compares all positions every so often, for a backend that asks for it.
func (s *session) check(ctx context.Context) {
	t := time.NewTicker(s.checkEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		s.mu.Lock()
		for _, l := range s.locals {
			if l.feed != nil {
				s.heads.ask(l.feed)
			}
		}
		s.mu.Unlock()
	}
}

// heads asks the backend for the heads of many feeds at once: while one trip is
// under way the next one's names gather.
type heads struct {
	s     *session
	mu    sync.Mutex
	queue []*feed
	busy  bool
}

// headsBatch bounds one trip.
const headsBatch = 512

// ask will call f.headed, on another goroutine.
func (hs *heads) ask(f *feed) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	hs.queue = append(hs.queue, f)
	if !hs.busy {
		hs.busy = true
		go hs.run()
	}
}

func (hs *heads) run() {
	var b backoff
	for {
		hs.mu.Lock()
		n := min(len(hs.queue), headsBatch)
		batch := hs.queue[:n:n]
		hs.queue = hs.queue[n:]
		if n == 0 {
			hs.queue, hs.busy = nil, false
			hs.mu.Unlock()
			return
		}
		hs.mu.Unlock()

		names := make([]string, n)
		for i, f := range batch {
			names[i] = f.name
		}
		ctx, done := context.WithTimeout(hs.s.ctx, attempt)
		got, err := hs.s.backend.Heads(ctx, names)
		done()
		if err == nil && len(got) != n {
			err = fmt.Errorf("the backend returned %d heads for %d channels", len(got), n)
		}
		for i, f := range batch {
			if err != nil {
				f.headed(Head{}, err)
			} else {
				f.headed(got[i], nil)
			}
		}
		if err == nil {
			b = backoff{}
		} else if !b.sleep(hs.s.ctx) {
			// The session is over, and so are its feeds. Whoever asks again starts anew.
			hs.mu.Lock()
			hs.queue, hs.busy = nil, false
			hs.mu.Unlock()
			return
		}
	}
}
