package memory_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// recorder is a sink that writes down what it is told.
type recorder struct {
	mu      sync.Mutex
	busy    bool
	events  []string // "entry 1-3", "live", "interrupted", "failed", "resync"
	entries []dchannel.Entry
	reasons []error
}

func (r *recorder) note(event string, reason error, e *dchannel.Entry) {
	r.mu.Lock()
	if r.busy {
		panic("calls for one sink overlap")
	}
	r.busy = true
	r.mu.Unlock()
	defer func() { r.mu.Lock(); r.busy = false; r.mu.Unlock() }()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, event)
	r.reasons = append(r.reasons, reason)
	if e != nil {
		r.entries = append(r.entries, *e)
	}
}

func (r *recorder) Entry(e dchannel.Entry) {
	r.note(fmt.Sprintf("entry %d-%d", e.First(), e.Seq), nil, &e)
}
func (r *recorder) Resync(reason error)                  { r.note("resync", reason, nil) }
func (r *recorder) State(s dchannel.State, reason error) { r.note(s.String(), reason, nil) }

// told returns the events since it was asked last.
func (r *recorder) told() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	events := r.events
	r.events = nil
	return events
}

func (r *recorder) got() []dchannel.Entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.entries
}

func frame(text string) dchannel.Frame {
	return dchannel.Frame{ID: dchannel.NewID(), Count: 1, Data: []byte(text)}
}

func publish(t *testing.T, b *memory.Backend, channel string, f dchannel.Frame) dchannel.Position {
	t.Helper()
	pos, err := b.Publish(context.Background(), channel, f)
	require.NoError(t, err)
	return pos
}

func subscribe(t *testing.T, b *memory.Backend, channel string) (*recorder, dchannel.Subscription) {
	t.Helper()
	r := new(recorder)
	sub, err := b.Subscribe(context.Background(), channel, r)
	require.NoError(t, err)
	return r, sub
}

func readAll(t *testing.T, b *memory.Backend, channel string) dchannel.Page {
	t.Helper()
	page, err := b.Read(context.Background(), channel, dchannel.Position{}, 1<<30)
	require.NoError(t, err)
	return page
}

func texts(entries []dchannel.Entry) []string {
	all := make([]string, 0, len(entries))
	for _, e := range entries {
		all = append(all, string(e.Data))
	}
	return all
}

// calls is every method of a backend that can fail, each as one function.
func calls(b *memory.Backend, channel string) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"Publish": func(ctx context.Context) error {
			_, err := b.Publish(ctx, channel, frame("m"))
			return err
		},
		"MarkClosed": func(ctx context.Context) error {
			_, err := b.MarkClosed(ctx, channel, dchannel.NewID(), 0)
			return err
		},
		"Read": func(ctx context.Context) error {
			_, err := b.Read(ctx, channel, dchannel.Position{}, 1)
			return err
		},
		"Heads": func(ctx context.Context) error {
			_, err := b.Heads(ctx, nil)
			return err
		},
		"Subscribe": func(ctx context.Context) error {
			sub, err := b.Subscribe(ctx, channel, new(recorder))
			if err == nil {
				sub.Close()
			}
			return err
		},
		"Remove": func(ctx context.Context) error { return b.Remove(ctx, channel) },
	}
}

// isWrite tells which of calls may still be done after their context's end.
func isWrite(name string) bool { return name == "Publish" || name == "MarkClosed" || name == "Remove" }

var errTest = errors.New("pulled the plug")
